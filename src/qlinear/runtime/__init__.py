"""The machine: devices, processes of a job, threads per core, and memory in use."""
