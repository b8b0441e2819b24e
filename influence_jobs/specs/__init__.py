"""What requests of all kinds are made of: frozen, validated values. They load without torch."""
