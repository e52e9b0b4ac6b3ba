"""Which models are resident, and where: a pure core, and the shell that starts workers."""
