"""What two correct programs could decide differently, decided once."""
