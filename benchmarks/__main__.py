"""`python -m benchmarks`: what there is to run."""

from . import families


def main() -> None:
    print("families (python -m benchmarks.<family> --help):")
    for name, family in families().items():
        print(f"  {name:<26}{family.title}")
    print("python -m benchmarks.gpu --out DIR     everything on a CUDA machine within nine minutes")
    print("python -m benchmarks.tables [--check]  the tables of README.md and docs/ from the recorded results")


if __name__ == "__main__":
    main()
