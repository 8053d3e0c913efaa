"""The commands of srcip, one file each."""
