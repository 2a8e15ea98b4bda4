"""Many adapters on one model, each chosen per request."""
