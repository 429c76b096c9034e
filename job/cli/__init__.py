"""The command line: one thin module per noun, without logic. A command imports its modules when it runs."""
