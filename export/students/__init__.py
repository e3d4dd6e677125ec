"""The students that come with the product, and how a user's own is found."""

from edgestill.export.students.networks import Residual, Student, StudentOptions
from edgestill.export.students.registry import ARCHITECTURES, INSTANCE, build_student, find_student

__all__ = ["ARCHITECTURES", "INSTANCE", "Residual", "Student", "StudentOptions", "build_student", "find_student"]
