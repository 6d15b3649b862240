"""Who holds which experts, tokens and weights, and what travels between ranks."""
