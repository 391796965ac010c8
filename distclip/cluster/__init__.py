"""Several hosts: from a hosts file to a watched run. It runs where MLX is missing or broken."""
