"""An adapter goes on learning, stage by stage, without forgetting: frozen directions and learned magnitudes."""
