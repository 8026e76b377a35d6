"""The generated tables of README.md and docs/, one module each: `render(results)` returns Markdown."""
