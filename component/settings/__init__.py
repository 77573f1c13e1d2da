"""Every key of a training YAML; YAML, command line and machine become settings."""
