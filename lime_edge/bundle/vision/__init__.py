"""Pictures on a device: opened, cut into tiles, and features put where the prompt has their tokens. numpy and Pillow."""
