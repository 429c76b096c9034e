"""The processes of a job: how they are started, agree, are stopped, hang and die."""
