"""What SPD is compared with: its predecessor APD, and fixed pieces that only have their gates trained."""
