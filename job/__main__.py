"""`python -m job`, the same as `ddpm`; what the launcher starts begins here."""

from job.processes.launched import attach

if __name__ == "__main__":
    attach()

    from job.cli.app import main

    main()
