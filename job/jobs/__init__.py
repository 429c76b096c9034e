"""Jobs: a command as data, and the engines that run it. What a dry run prints is what is sent."""
