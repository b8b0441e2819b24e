"""The frozen, validated values that specs of all kinds consist of. They load without torch."""
