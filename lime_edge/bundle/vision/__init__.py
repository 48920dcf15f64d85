"""Pictures on a device: opened, cut into tiles, features packed into rows. numpy and Pillow."""
