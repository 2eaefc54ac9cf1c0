"""What the commands run, a file each."""
