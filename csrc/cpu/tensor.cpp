#include "tensor.h"

namespace trunkline {

namespace {

// Names and dtypes, made once; they live as long as the interpreter.
struct Known {
    PyObject *data_ptr, *shape, *stride, *dtype, *is_cpu;
    PyObject *float32, *float64, *bfloat16, *int32, *int64, *uint8, *int8, *boolean;

    Known() {
        data_ptr = PyUnicode_InternFromString("data_ptr");
        shape = PyUnicode_InternFromString("shape");
        stride = PyUnicode_InternFromString("stride");
        dtype = PyUnicode_InternFromString("dtype");
        is_cpu = PyUnicode_InternFromString("is_cpu");
        nb::module_ torch = nb::module_::import_("torch");
        float32 = nb::object(torch.attr("float32")).release().ptr();
        float64 = nb::object(torch.attr("float64")).release().ptr();
        bfloat16 = nb::object(torch.attr("bfloat16")).release().ptr();
        int32 = nb::object(torch.attr("int32")).release().ptr();
        int64 = nb::object(torch.attr("int64")).release().ptr();
        uint8 = nb::object(torch.attr("uint8")).release().ptr();
        int8 = nb::object(torch.attr("int8")).release().ptr();
        boolean = nb::object(torch.attr("bool")).release().ptr();
    }
};

const Known& known() {
    static const Known found;
    return found;
}

nb::object attribute(nb::handle object, PyObject* name) {
    PyObject* value = PyObject_GetAttr(object.ptr(), name);
    if (!value) throw nb::python_error();
    return nb::steal(value);
}

nb::object call(nb::handle object, PyObject* name) {
    PyObject* value = PyObject_CallMethodNoArgs(object.ptr(), name);
    if (!value) throw nb::python_error();
    return nb::steal(value);
}

std::string shown(nb::handle object) {
    PyObject* text = PyObject_Str(object.ptr());
    if (!text) throw nb::python_error();
    return nb::steal<nb::str>(text).c_str();
}

}  // namespace

void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

Tensor::Tensor(const char* operation_, const char* name_, nb::handle object_)
    : object(object_), operation(operation_), name(name_) {
    const Known& k = known();
    nb::object shape = attribute(object, k.shape), strides = call(object, k.stride), dtype = attribute(object, k.dtype);
    type = dtype.ptr() == k.float32    ? Type::float32
           : dtype.ptr() == k.float64  ? Type::float64
           : dtype.ptr() == k.bfloat16 ? Type::bfloat16
           : dtype.ptr() == k.int32    ? Type::int32
           : dtype.ptr() == k.int64    ? Type::int64
           : dtype.ptr() == k.uint8    ? Type::uint8
           : dtype.ptr() == k.int8     ? Type::int8
           : dtype.ptr() == k.boolean  ? Type::boolean
                                       : Type::other;
    if (!PyTuple_Check(shape.ptr()) || !PyTuple_Check(strides.ptr())) refuse(std::string(operation) + ": no tensor");
    EXPECT(*this, attribute(object, k.is_cpu).ptr() == Py_True, "a CPU tensor");
    dims = int(PyTuple_GET_SIZE(shape.ptr()));
    EXPECT(*this, dims <= MOST_DIMS, "a tensor of at most 6 dimensions");
    for (int i = 0; i < dims; i++) {
        size[i] = PyLong_AsLong(PyTuple_GET_ITEM(shape.ptr(), i));
        stride[i] = PyLong_AsLong(PyTuple_GET_ITEM(strides.ptr(), i));
    }
    data = reinterpret_cast<char*>(PyLong_AsSize_t(call(object, k.data_ptr).ptr()));
    if (PyErr_Occurred()) throw nb::python_error();
}

bool Tensor::dense(int first) const {
    long expected = 1;
    for (int i = 0; i < dims; i++)
        if (size[i] == 0) return true;  // strides of nothing are anything
    for (int i = dims - 1; i >= first; i--) {
        if (size[i] != 1 && stride[i] != expected) return false;
        expected *= size[i];
    }
    return true;
}

std::string Tensor::text() const {
    std::string result = shown(attribute(object, known().shape)) + " " + shown(attribute(object, known().dtype));
    if (!dense()) result += " with strides " + shown(call(object, known().stride));
    return result + " on " + shown(object.attr("device"));
}

void Tensor::refuse_for(const std::string& wanted) const {
    refuse(std::string(operation) + ": " + name + " is " + text() + "; " + wanted + " is expected");
}

}  // namespace trunkline
