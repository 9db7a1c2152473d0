"""stub while the workflow is brought up"""
