"""What a run takes on machines that are not here: memory, traffic and time of an update."""
