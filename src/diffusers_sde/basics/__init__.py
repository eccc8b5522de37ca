"""What everything else uses: checks of arguments, noise, files, command lines from dataclasses."""
