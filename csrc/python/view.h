// Python buffers as arrays.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace orz::python {

namespace py = pybind11;

// A view of a contiguous Python buffer that keeps it alive and locked. Made and destroyed with the GIL held.
class View {
 public:
  View(const py::handle& object, const char* name, bool writable = false) : name_(name) {
    if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0)
      throw py::error_already_set();
  }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  ~View() { PyBuffer_Release(&view_); }

  size_t bytes() const { return static_cast<size_t>(view_.len); }
  uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }

  template <typename T>
  T* array(size_t count) const {
    if (bytes() != count * sizeof(T))
      throw std::invalid_argument(std::string(name_) + ": expected " + std::to_string(count * sizeof(T)) +
                                  " bytes, found " + std::to_string(bytes()));
    if (reinterpret_cast<uintptr_t>(view_.buf) % alignof(T) != 0)
      throw std::invalid_argument(std::string(name_) + ": expected an aligned buffer");
    return reinterpret_cast<T*>(view_.buf);
  }

 private:
  const char* name_;
  Py_buffer view_{};
};

}  // namespace orz::python
