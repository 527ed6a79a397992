"""What the machine gives: devices, processes, threads, memory."""
