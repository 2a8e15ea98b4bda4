"""The tuning modes: papers as plain torch modules, which know no model and read no file."""
