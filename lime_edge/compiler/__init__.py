"""What a workstation needs: reading, folding, quantizing. Imports torch; a device never does."""
