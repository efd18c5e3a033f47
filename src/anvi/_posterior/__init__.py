"""Questions to a fitted model: model and cells in, arrays out, chunk by chunk on the device."""
