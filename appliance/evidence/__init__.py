"""What an alert carries beside the appliance's own findings."""
