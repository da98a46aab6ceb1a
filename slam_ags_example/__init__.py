"""SLAM-AGS end to end, from bags of images to ranked cells: a worked use of gradsurgery."""
