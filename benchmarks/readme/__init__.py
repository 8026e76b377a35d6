"""The generated tables of README.md, one module each: `render(results)` returns Markdown."""
