"""From the user's object to tensors and back: the only stage that knows MuData and AnnData."""
