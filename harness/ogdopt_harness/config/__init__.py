"""What a study is: its configuration, and the command line and recipes that it is read from."""
