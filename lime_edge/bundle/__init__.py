"""The bundle: what is in the directory, and how it is read and changed. numpy only."""
