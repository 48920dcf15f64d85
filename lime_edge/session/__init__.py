"""Sessions: an opened bundle on one engine, its experts switched without reloading. numpy only."""
