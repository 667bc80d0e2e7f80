"""What a run needs before it is paid for: memory, time, traffic and storage of each way to spread it."""
