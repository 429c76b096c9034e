"""The command line: one thin module per noun, no logic. Modules import what they run only when they run it."""

import os

# gcsfs would probe each bucket over gRPC, which emulators lack and forks do not survive; it reads this when imported.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
