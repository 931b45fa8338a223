"""Ray jobs, the command line, cluster files and dataset specs. The only place that knows Ray."""
