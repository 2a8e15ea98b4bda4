"""What a user keeps: settings, modules attached to a model, and the folder they are saved in."""
