/* The entry points of OpenCL 1.2 that qcompile_device.c takes from the vendor's library. */
#ifndef QCOMPILE_OPENCL_H
#define QCOMPILE_OPENCL_H

#include <stddef.h>
#include <stdint.h>

#define QC_CL(X)                                                                                                       \
  X(int32_t, clGetPlatformIDs, (uint32_t room, void** platforms, uint32_t* count))                                     \
  X(int32_t, clGetDeviceIDs, (void* platform, uint64_t kind, uint32_t room, void** devices, uint32_t* count))          \
  X(int32_t, clGetDeviceInfo, (void* device, uint32_t what, size_t room, void* place, size_t* size))                   \
  X(void*, clCreateContext,                                                                                            \
    (const intptr_t* properties, uint32_t count, void* const* devices,                                                 \
     void (*told)(const char*, const void*, size_t, void*), void* with, int32_t* status))                              \
  X(void*, clCreateCommandQueue, (void* context, void* device, uint64_t properties, int32_t* status))                  \
  X(void*, clCreateProgramWithSource,                                                                                  \
    (void* context, uint32_t count, const char** texts, const size_t* sizes, int32_t* status))                         \
  X(int32_t, clBuildProgram,                                                                                           \
    (void* program, uint32_t count, void* const* devices, const char* options, void (*done)(void*, void*),             \
     void* with))                                                                                                      \
  X(int32_t, clGetProgramBuildInfo,                                                                                    \
    (void* program, void* device, uint32_t what, size_t room, void* place, size_t* size))                              \
  X(void*, clCreateKernel, (void* program, const char* name, int32_t* status))                                         \
  X(int32_t, clGetKernelWorkGroupInfo,                                                                                 \
    (void* kernel, void* device, uint32_t what, size_t room, void* place, size_t* size))                               \
  X(int32_t, clSetKernelArg, (void* kernel, uint32_t number, size_t size, const void* value))                          \
  X(void*, clCreateBuffer, (void* context, uint64_t flags, size_t size, void* host, int32_t* status))                  \
  X(int32_t, clEnqueueWriteBuffer,                                                                                     \
    (void* queue, void* buffer, uint32_t blocking, size_t offset, size_t size, const void* from, uint32_t waits,       \
     void* const* waited, void** event))                                                                               \
  X(int32_t, clEnqueueReadBuffer,                                                                                      \
    (void* queue, void* buffer, uint32_t blocking, size_t offset, size_t size, void* to, uint32_t waits,               \
     void* const* waited, void** event))                                                                               \
  X(int32_t, clEnqueueNDRangeKernel,                                                                                   \
    (void* queue, void* kernel, uint32_t rank, const size_t* offset, const size_t* every, const size_t* group,         \
     uint32_t waits, void* const* waited, void** event))                                                               \
  X(int32_t, clReleaseMemObject, (void* buffer))                                                                       \
  X(int32_t, clReleaseKernel, (void* kernel))                                                                          \
  X(int32_t, clReleaseProgram, (void* program))                                                                        \
  X(int32_t, clReleaseCommandQueue, (void* queue))                                                                     \
  X(int32_t, clReleaseContext, (void* context))

#define QC_CL_POINTER(result, name, arguments) result(*name) arguments;

#endif
