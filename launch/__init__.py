"""From a laptop to a pod and back, through the vendors' own command-line tools. See README.md."""
