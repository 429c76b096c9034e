"""`python -m job`, the same as `ddpm`."""

from job.cli.app import main

if __name__ == "__main__":
    main()
