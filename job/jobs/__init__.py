"""Jobs: a command as data, and the engines that run it. A dry run prints exactly the requests of a submission."""
