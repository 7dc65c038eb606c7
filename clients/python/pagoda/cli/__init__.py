"""The command line `pagoda`. Each command's module is loaded when it runs: `pagoda --help` is quick."""
