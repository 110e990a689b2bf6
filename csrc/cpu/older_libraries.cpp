// Lets a library that a new compiler builds load where PyTorch's own wheels do: glibc 2.28 and GCC 8's
// libstdc++ (manylinux_2_28). Each symbol below is the only one of its kind in this library that a newer
// glibc or libstdc++ brings. Defined here and hidden, it comes from no system. tests/test_build.py names what
// the library may need.
#include <new>
#include <sstream>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GLIBCXX__)

#define KDFAST_HIDDEN extern "C" __attribute__((visibility("hidden")))

// glibc 2.29's exp, exp2, log and log2 leave out a check of the old error handling; their results are the
// same bits.
#define KDFAST_OLD(function)                                        \
  __asm__(".symver old_" #function ", " #function "@GLIBC_2.2.5");  \
  extern "C" double old_##function(double);                         \
  KDFAST_HIDDEN double new_##function(double x) __asm__(#function); \
  double new_##function(double x) { return old_##function(x); }
KDFAST_OLD(exp)
KDFAST_OLD(exp2)
KDFAST_OLD(log)
KDFAST_OLD(log2)

// glibc 2.32: shared_ptr counts without atomic instructions where this is not 0.
KDFAST_HIDDEN char single_threaded __asm__("__libc_single_threaded");
char single_threaded = 0;

// GCC 9: constructors without an argument.
KDFAST_HIDDEN void make_stringstream(std::stringstream* at) __asm__(
    "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void make_stringstream(std::stringstream* at) { new (at) std::stringstream(std::ios::in | std::ios::out); }
KDFAST_HIDDEN void make_ostringstream(std::ostringstream* at) __asm__(
    "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void make_ostringstream(std::ostringstream* at) { new (at) std::ostringstream(std::ios::out); }

// GCC 11.
KDFAST_HIDDEN [[noreturn]] void throw_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

#endif
