"""torch-fidelity installs a package of this name, which would win over a folder without this file."""
