"""Small models, adapters, tasks and fleets that several tests share."""
