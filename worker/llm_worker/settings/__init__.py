"""The only folder that reads the environment and the command line."""
