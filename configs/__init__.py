"""Run configurations: `default` names every field once, the others override a few."""
