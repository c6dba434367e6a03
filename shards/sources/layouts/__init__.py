"""Source layouts. Each module here is one value of `--layout`: its name is the module's, its reader the function
`read`."""
