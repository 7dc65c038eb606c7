"""Tool calls in a model's own words: telling a model of tools, and reading its calls out of what it says."""
