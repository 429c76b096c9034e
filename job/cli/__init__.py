"""The command line: one thin module per noun, no logic. Modules import what they run only when they run it."""
